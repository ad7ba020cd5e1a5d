"""Upstream's path to `tools/upstream/extract_video_frames.py`."""

from internvl.tools.upstream.extract_video_frames import (
    fetch_images,
    fetch_images_parallel,
    get_index,
    main,
    transform_video,
)

__all__ = ["fetch_images", "fetch_images_parallel", "get_index", "transform_video"]

if __name__ == "__main__":
    main()
