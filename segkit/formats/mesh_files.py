"""Write surfaces as STL and PLY, the two that printers, 3D Slicer, MeshLab, Blender and ParaView all open.

Both hold numbers without saying of what. Here they are mm in LPS (x to the left, y to the back, z to the head), which
is what 3D Slicer takes a file for that says nothing (since its version 4.11), and what DICOM uses; a comment in the
file says so as well, in the words that 3D Slicer reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SPACE = "SPACE=LPS"
RAS_TO_LPS = np.array([-1, -1, 1], np.float32)  # half a turn around z: what was outside stays outside

_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_VERTEX = np.dtype([("place", "<f4", 3), ("color", "u1", 3)])
_FACE = np.dtype([("sides", "u1"), ("vertices", "<i4", 3)])


def write_stl(path: Path, vertices: np.ndarray, faces: np.ndarray, title: str) -> None:
    """Write a binary STL. vertices: (V, 3) in mm, RAS; faces: int (F, 3), counter-clockwise seen from outside.

    80 bytes of text, which must not begin with "solid", the number of triangles, then 50 bytes each.
    """
    triangles = np.zeros(len(faces), _TRIANGLE)
    triangles["corners"] = (vertices * RAS_TO_LPS)[faces]
    first, second, third = np.moveaxis(triangles["corners"], 1, 0)
    normals = np.cross(second - first, third - first)
    # a triangle without area has no normal: STL's word for that is 0 0 0
    triangles["normal"] = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.float32(1e-30))
    header = f"binary STL in mm, {SPACE}, {title}".encode()[:80].ljust(80, b" ")
    path.write_bytes(header + np.uint32(len(faces)).astype("<u4").tobytes() + triangles.tobytes())


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray, color: tuple[int, int, int], title: str) -> None:
    """Write a binary PLY, each vertex of `color` (0 to 255). vertices and faces as for `write_stl`; title: one line."""
    table = np.zeros(len(vertices), _VERTEX)
    table["place"] = vertices * RAS_TO_LPS
    table["color"] = color
    triangles = np.zeros(len(faces), _FACE)
    triangles["sides"] = 3
    triangles["vertices"] = faces
    header = [
        "ply", "format binary_little_endian 1.0", f"comment {title}, in mm", f"comment {SPACE}",
        f"element vertex {len(vertices)}", *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
        f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header",
    ]  # fmt: skip
    path.write_bytes("\n".join([*header, ""]).encode() + table.tobytes() + triangles.tobytes())
