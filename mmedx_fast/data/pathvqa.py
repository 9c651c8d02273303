"""PathVQA (https://huggingface.co/datasets/flaviagiammarino/path-vqa): parquet with ``image``,
``question``, ``answer``.

There is no column for the type of answer: closed are the answers yes and no in any case, when a
prompt is made and when it is scored alike (MedEvalKit minds the case only for its prompt, and so
asks "Yes" questions as open ones). Other sets have the same columns, so the form is recognised by a
folder or file name with "path-vqa" (or "pathvqa") in it. The original release is pickled and is not
read.
"""

from __future__ import annotations

from mmedx_fast.data.hub import SUFFIXES, hub_files, read_any
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import Loader, Row, RowContext
from mmedx_fast.data.vqa_rad import is_bare, parse_bare


def detect(row: Row) -> bool:
    """Whether a row has the bare columns and lies in a folder named after the data set."""
    return is_bare(row, r"path[-_ ]?vqa")


def parse(row: Row, number: int, context: RowContext) -> Record:
    """One row to a record; raises ``RowError``."""
    return parse_bare(row, number, context, "pathvqa")


LOADER = Loader(
    name="pathvqa",
    columns="image, question, answer (in a folder named path-vqa)",
    detect=detect,
    parse=parse,
    files=hub_files,
    rows=read_any,
    suffixes=SUFFIXES,
)
