"""A multipart/form-data upload (RFC 7578) read as it comes: the file goes to the disk, the fields are few and short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from edgellm.errors import RequestError
from edgellm.tune.files import FileWriter

FIELDS_MAX = 32
FIELD_BYTES_MAX = 1 << 16
HEADER_BYTES_MAX = 1 << 13
NAME_CHARS_MAX = 255


class UploadForm:
    """Feed it the body, then `end`. `fields` are then the texts, `writer` and `filename` the part named `file`.

    When the block ends, what was not kept of the file is removed.
    """

    def __init__(self, content_type: str, begin: Callable[[], FileWriter]) -> None:
        """`begin` makes the place for the file. Raises RequestError if `content_type` names no boundary."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:  # RFC 2046, section 5.1.1
            raise RequestError("The body must be multipart/form-data, and its Content-Type name the boundary")
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.writer: FileWriter | None = None
        self._begin = begin
        self._parts = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._name: str | None = None  # of the field whose text is being read; None: the file, or a part to skip
        self._in_file = False
        self._text = bytearray()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": lambda data, start, end: self._add(data[start:end]),
                "on_part_end": self._part_ends,
                "on_end": self._all_ends,
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer is not None:
            self.writer.__exit__(*exception)

    def feed(self, data: bytes) -> None:
        """The next piece of the body. Raises RequestError, and what the file's writer raises."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise RequestError(f"The body is not valid multipart/form-data: {error}") from None

    def end(self) -> FileWriter:
        """The file, once all has come. Raises RequestError if the body was cut short or had no file."""
        if not self._ended:
            raise RequestError("The body is not valid multipart/form-data: it ends too early")
        if self.writer is None:
            raise RequestError("Missing required parameter: 'file'.", "file")
        return self.writer

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > FIELDS_MAX:
            raise RequestError(f"The form has more than {FIELDS_MAX} parts")
        self._disposition, self._name, self._in_file = b"", None, False
        self._text.clear()

    def _add_header(self, part: int, data: bytes) -> None:
        self._header[part].extend(data)
        if len(self._header[part]) > HEADER_BYTES_MAX:
            raise RequestError("A part of the form has a header that is too long")

    def _header_ends(self) -> None:
        name, value = (bytes(part) for part in self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        for part in self._header:
            part.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise RequestError("A part of the form has no name")
        if name != "file":
            self._name = name[:NAME_CHARS_MAX]
            return
        if b"filename" not in options:
            raise RequestError("The part 'file' must be a file, with a file name", "file")
        if self.writer is not None:
            raise RequestError("Only one file can be uploaded at a time", "file")
        self.filename = _plain_name(options[b"filename"].decode("utf-8", "replace"))
        self.writer, self._in_file = self._begin(), True

    def _add(self, data: bytes) -> None:
        if self._in_file and self.writer is not None:
            self.writer.write(data)
            return
        self._text.extend(data)
        if len(self._text) > FIELD_BYTES_MAX:
            raise RequestError("The field is too long", self._name)

    def _part_ends(self) -> None:
        if self._name is None:
            return
        try:
            self.fields[self._name] = self._text.decode()
        except UnicodeDecodeError:
            raise RequestError("The field is not valid UTF-8", self._name) from None

    def _all_ends(self) -> None:
        self._ended = True


def _plain_name(name: str) -> str:
    """The last part of a path of any system, without what cannot be printed."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(char for char in last if char.isprintable())[:NAME_CHARS_MAX] or "file"
