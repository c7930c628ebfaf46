"""The operators of the network that have more than one implementation. The folder says what is computed, the file in it who computes.

* ``depthwise_gelu``: the depthwise convolution of the feed-forward network with its GELU;
* ``block``: a whole block;
* ``deform_conv2d``, in :mod:`mm_modules.DCN`: the deformable convolution of token merging.

:mod:`mm_modules.dispatch` chooses among the backends of each, and says why not; ``python -m litv2 env`` prints its choice for this
machine, ``LITV2_OPS`` forces one. A new backend is a file, and its name in the list of its operator.
"""

from mm_modules.dispatch import OPERATORS, use

from .block_forward import block
from .depthwise import depthwise_gelu
from .padding import pad_to_multiple

__all__ = ["OPERATORS", "block", "depthwise_gelu", "pad_to_multiple", "use"]
