# SPDX-License-Identifier: Apache-2.0
"""Looks for known vulnerabilities of the locked packages: python scripts/audit.py LOCK...

pip-audit asks PyPI; where that has no data, as a mirror of it may not, it would report success without having looked at anything.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main(locks: list[str]) -> int:
    status = 0
    for lock in locks:
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner=off", "--format=json", "-r", lock]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            packages = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError):
            print(f"{lock}: NOT AUDITED, the data cannot be had: {done.stderr.strip().splitlines()[-1:]}")
            continue
        asked = [package for package in packages if "skip_reason" not in package]
        if not asked:
            print(f"{lock}: NOT AUDITED, there is no data of any of its {len(packages)} packages here")
            continue
        found = [(package, each) for package in asked for each in package["vulns"]]
        print(f"{lock}: {len(found)} known vulnerabilities in {len(asked)} packages; {len(packages) - len(asked)} without data")
        for package, each in found:
            print(f"  {package['name']} {package['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no version'}")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
