"""Films of a stranger: made to open other files, or to take memory."""

import io
import struct

import av
import numpy as np
import pytest
from helpers.video_files import film
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.videos import MAX_FRAME_PIXELS, read_frames

PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{0}\n#EXT-X-ENDLIST\n"
SESSION = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
LISTS = {"list.mp4": "ffconcat version 1.0\nfile {0}\n", "hls.mp4": PLAYLIST, "hls.m3u8": PLAYLIST, "sdp.mp4": SESSION}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_films_opens_none_of_them(tmp_path, name):
    film(tmp_path / "secret.mp4")
    (tmp_path / name).write_text(LISTS[name].format("secret.mp4"))
    with pytest.raises(UnusableSample, match=f"{name} cannot be read"):
        read_frames(str(tmp_path / name), 4)


def growing_film(path, side: int) -> None:
    """Motion JPEG whose header says 64 x 64."""
    picture = io.BytesIO()
    Image.new("L", (side, side)).save(picture, "JPEG")
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        container.start_encoding()
        for time in range(3):
            packet = av.Packet(picture.getvalue())
            packet.pts = packet.dts = time
            packet.stream, packet.time_base = stream, stream.time_base
            container.mux(packet)


def test_a_film_of_absurd_frames_is_refused(tmp_path, peak):
    """Their size is known when the film is opened, or when a frame is decoded."""
    side = 7000
    assert side**2 > MAX_FRAME_PIXELS
    film(tmp_path / "large.avi", 1, size=(side, side))
    growing_film(tmp_path / "growing.avi", 12000)
    peak()
    with pytest.raises(UnusableSample, match="large.avi has frames of 7000 x 7000 pixels, more than 35,389,440"):
        read_frames(str(tmp_path / "large.avi"), 4)
    with pytest.raises(UnusableSample, match="growing.avi (has frames of|cannot be read)"):
        read_frames(str(tmp_path / "growing.avi"), 4)
    assert peak() < 400e6


def test_a_film_whose_header_counts_absurdly_is_refused(tmp_path, peak):
    """Number and time of its frames, each as large as its field allows."""
    film(tmp_path / "film.mp4")
    content = (tmp_path / "film.mp4").read_bytes()
    for box, places in {
        "stsz": (4, 8),
        "stts": (4, 8, 12),
        "stsc": (4,),
        "stco": (4,),
        "mvhd": (16,),
        "mdhd": (12, 16),
    }.items():
        for place in places:
            at = content.index(box.encode()) + 4 + place
            for value in (0, 0x7FFFFFFF, 0xFFFFFFFF):
                (tmp_path / "odd.mp4").write_bytes(content[:at] + struct.pack(">I", value) + content[at + 4 :])
                peak()
                try:
                    frames = read_frames(str(tmp_path / "odd.mp4"), 4)
                    assert len(frames) == 4 and np.array(frames[0]).ndim == 3
                except UnusableSample as reason:
                    assert "odd.mp4" in str(reason)
                assert peak() < 100e6, (box, place, value)
