"""Readers: from the files people have to one raw form, `RawData`.

One module per format: `table` (CSV, TSV, JSON Lines, Parquet with a column mapping), `sequences`
(S3-Rec), `movielens`, `amazon`, `recbole`, `mind`, `lcrec`, `minionerec` and `huggingface`. What
they share: `raw_data` (the form and its checks), `files`, `json_records`, `values` and `times`.

Every reader checks what it read before anything is computed from it: no null ids, no item twice in
the catalogue, no interaction with an item that the catalogue lacks. Ids are kept as they are given:
an id column of a text file becomes integers only if every value is a plain integer ("7", not
"007"). Where a format is several files, `<format>_files` names those that its reader will read.
"""

from genrec.data.readers.amazon import AMAZON_VERSIONS, read_amazon
from genrec.data.readers.huggingface import read_huggingface
from genrec.data.readers.lcrec import read_lcrec
from genrec.data.readers.mind import mind_files, read_mind
from genrec.data.readers.minionerec import minionerec_files, read_minionerec
from genrec.data.readers.movielens import movielens_files, read_movielens
from genrec.data.readers.raw_data import SUBSECOND, UNKNOWN_ITEMS, RawData
from genrec.data.readers.recbole import read_recbole, recbole_files
from genrec.data.readers.sequences import read_sequences
from genrec.data.readers.table import TableMapping, read_table
from genrec.data.readers.values import ID_TYPES

__all__ = [
    "AMAZON_VERSIONS",
    "ID_TYPES",
    "SUBSECOND",
    "UNKNOWN_ITEMS",
    "RawData",
    "TableMapping",
    "mind_files",
    "minionerec_files",
    "movielens_files",
    "read_amazon",
    "read_huggingface",
    "read_lcrec",
    "read_mind",
    "read_minionerec",
    "read_movielens",
    "read_recbole",
    "read_sequences",
    "read_table",
    "recbole_files",
]
