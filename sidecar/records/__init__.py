"""Request records: what training, scoring and replay read, from any of the usual logs."""
from sidecar.records.model import BadLine, RecordsError, RequestRecord, printable
from sidecar.records.reader import FORMATS, FileReport, Reader, read
from sidecar.records.writer import JsonLinesWriter, write

__all__ = ["FORMATS", "BadLine", "FileReport", "JsonLinesWriter", "Reader", "RecordsError", "RequestRecord",
           "printable", "read", "write"]
