"""Upstream's path to `tools/upstream/images_stitching.py`."""

from internvl.tools.upstream.images_stitching import custom_image, get_images, main

__all__ = ["custom_image", "get_images"]

if __name__ == "__main__":
    main()
