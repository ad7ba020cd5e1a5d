"""Untrusted video files: made to open other files, or to exhaust memory."""

import io
import struct

import av
import numpy as np
import pytest
from helpers.video_files import write_video
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.video_files import MAX_FRAME_PIXELS
from internvl.data.videos import read_frames

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{0}\n#EXT-X-ENDLIST\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
PLAYLISTS = {"list.mp4": "ffconcat version 1.0\nfile {0}\n", "hls.mp4": HLS, "hls.m3u8": HLS, "sdp.mp4": SDP}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_open_no_other_file(tmp_path, name):
    write_video(tmp_path / "secret.mp4")
    (tmp_path / name).write_text(PLAYLISTS[name].format("secret.mp4"))
    with pytest.raises(UnusableSample, match=f"{name} cannot be read"):
        read_frames(str(tmp_path / name), 4)


def write_video_with_false_header(path, side: int) -> None:
    """Write motion JPEG of `side` pixels square, declared as 64 x 64."""
    frame = io.BytesIO()
    Image.new("L", (side, side)).save(frame, "JPEG")
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        container.start_encoding()
        for time in range(3):
            packet = av.Packet(frame.getvalue())
            packet.pts = packet.dts = time
            packet.stream, packet.time_base = stream, stream.time_base
            container.mux(packet)


def test_videos_with_huge_frames_are_refused(tmp_path, measure_memory_peak):
    """Frame sizes are known on opening the file, or on decoding."""
    side = 7000
    assert side**2 > MAX_FRAME_PIXELS
    write_video(tmp_path / "large.avi", 1, size=(side, side))
    write_video_with_false_header(tmp_path / "false.avi", 12000)
    measure_memory_peak()
    with pytest.raises(UnusableSample, match="large.avi has frames of 7000 x 7000 pixels, more than 35,389,440"):
        read_frames(str(tmp_path / "large.avi"), 4)
    with pytest.raises(UnusableSample, match="false.avi (has frames of|cannot be read)"):
        read_frames(str(tmp_path / "false.avi"), 4)
    assert measure_memory_peak() < 400e6


def test_absurd_counts_in_a_header_exhaust_no_memory(tmp_path, measure_memory_peak):
    """Numbers and times of frames, each as large as its field allows."""
    write_video(tmp_path / "video.mp4")
    content = (tmp_path / "video.mp4").read_bytes()
    for box, offsets in {
        "stsz": (4, 8),
        "stts": (4, 8, 12),
        "stsc": (4,),
        "stco": (4,),
        "mvhd": (16,),
        "mdhd": (12, 16),
    }.items():
        for offset in offsets:
            start = content.index(box.encode()) + 4 + offset
            for value in (0, 0x7FFFFFFF, 0xFFFFFFFF):
                (tmp_path / "odd.mp4").write_bytes(content[:start] + struct.pack(">I", value) + content[start + 4 :])
                measure_memory_peak()
                try:
                    frames = read_frames(str(tmp_path / "odd.mp4"), 4)
                    assert len(frames) == 4 and np.array(frames[0]).ndim == 3
                except UnusableSample as reason:
                    assert "odd.mp4" in str(reason)
                assert measure_memory_peak() < 100e6, (box, offset, value)
