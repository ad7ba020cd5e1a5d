"""Compile the driver module of Triton, which it would compile at its first kernel.

    python docker/build_triton_driver.py FOLDER    write FOLDER/driver.so, for the script `cc`

The module is linked against an empty library in place of the driver's: a machine that builds images may have none.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        library = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", f"{work}/libcuda.so.1", "-x", "c", "/dev/null"]
        subprocess.run(library, check=True)
        # Triton reads both when it is imported.
        os.environ.update(TRITON_LIBCUDA_PATH=work, TRITON_CACHE_DIR=f"{work}/cache")
        from triton.backends.nvidia import driver
        from triton.runtime.build import compile_so_from_file

        source = os.path.join(driver.dirname, "driver.c")
        module = compile_so_from_file(
            source, "cuda_utils", driver.library_dirs(), driver.include_dirs, driver.libraries
        )
        shutil.copy(module, folder / "driver.so")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
