# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set of images in class folders: files, classes, duplicates, leaks and labels.

``listing`` finds the images as the trainer does, ``reading`` reads each once, ``duplicates`` and ``labels`` compare them, ``findings`` puts
the results together, and ``page`` shows them.
"""
