"""Recognises unsupported file formats by their first bytes, for error messages."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_CONVERT = (
    "which can run any code when it is opened and is not read: convert it where PyTorch is, by "
    "safetensors.torch.save_file(torch.load(FILE, map_location='cpu', weights_only=True), "
    "'FILE.safetensors'), or fetch the .safetensors file of the same model"
)


def describe(head: bytes) -> str | None:
    """Describes the format of a file and how to get the right one.

    Args:
      head: the first 512 bytes of the file or more, or all if it has fewer.

    Returns:
      The predicate of a sentence whose subject is the file, such as "is empty: fetch or copy it
      again"; None for an unknown format.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty: fetch or copy it again"
    if head.startswith(_POINTER):
        return (
            "is a pointer of git-lfs and not the file itself: run `git lfs pull` in its "
            "repository, or fetch it with `hf download`"
        )
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page: fetch the file itself, by the site's download link (of the hub, "
            "/resolve/ and not /blob/) or `hf download`"
        )
    if head.startswith(b"GGUF"):
        return (
            "is a GGUF file, whose weights are quantised, and is not read: fetch the .safetensors "
            "file of the same model"
        )
    if head.startswith(b"PK\x03\x04"):
        return f"is a zip archive, as torch.save makes of a pickle, {_CONVERT}"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return f"is a Python pickle, as torch.save made them, {_CONVERT}"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras's .h5) and is not read: fetch the .safetensors file of the same model"
    if head.startswith(b"\x93NUMPY"):
        return (
            "is an array of numpy (.npy) and is not read: write it with safetensors.numpy.save_file"
        )
    if head.startswith(b"\x1f\x8b"):
        return "is compressed (gzip): unpack it first"
    return None
