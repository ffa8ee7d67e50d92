"""python -m qlora report: draw the report of a run again."""

from typing import TYPE_CHECKING

from qlora.report.record import read

if TYPE_CHECKING:
    from qlora.commands.options import ReportOptions
from qlora.report.html import STATUS, write, write_card
from qlora.terminal import echo


def run(options: "ReportOptions") -> int:
    """Write the report of a run and say where it is; the model card too, if a finished run has none.

    Raises:
        UserError: exit 2 or 4 if there is no run to report on, 4 if it cannot be written.
    """
    record = read(options.run)
    if record.status == "finished" and not (record.folder / "adapter" / "README.md").exists():
        write_card(record)
    path = write(record)
    if STATUS[record.status]:
        echo(STATUS[record.status].partition(":")[0] + ".")
    echo(str(path))
    return 0
