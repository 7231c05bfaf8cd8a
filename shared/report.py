"""One self-contained HTML page of one or several runs: `python -m shared.report --run RUN [RUN ...] [--out FILE]`.

Draws what stands on disk (recipe, logs, previews, samples, and what evaluate and doctor wrote); computes nothing of its own
and asks the network for nothing. Several runs stand side by side, and where they differ in one number, that key's trade-off
is drawn. By default RUN/report/report.html, of several runs the first one's report/comparison.html.
"""

from pathlib import Path

from shared import config
from shared.config import InputError
from shared.run import open_run
from shared.show.page import page


def main() -> None:
    parser = config.Parser(prog="python -m shared.report", description="One HTML page of one or several runs.")
    parser.add_argument("--run", nargs="+", metavar="RUN", help="run folders (the newest by default)")
    parser.add_argument("--out", metavar="FILE", help="where to write the page")
    options = parser.parse_args()
    runs = [open_run(run) for run in options.run or [None]]
    try:
        html = page(runs)
    except ImportError as error:
        raise InputError(f"the report needs {error.name}: pip install 'latent-stack[metrics]'") from None
    out = Path(options.out or runs[0][0] / "report" / ("report.html" if len(runs) == 1 else "comparison.html"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html)
    config.say(f"report: {out} ({len(html) / 1e6:.1f} MB, needs nothing else)")


if __name__ == "__main__":
    config.run(main)
