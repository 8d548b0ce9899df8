"""The whole of the harness by hand: `python -m tests.survival --help`. The tests run a share of each part."""

import sys

import click

from tests.survival import deaths, power, shares


@click.group()
def main() -> None:
    """Do to a real service what must not hurt it; every failure prints the command that shows it again."""


@main.command("deaths")
@click.argument("points", nargs=-1, metavar="[SCENARIO:CALL:AGAIN]...")
@click.option("--share", default=1.0, help="Which part of all points is tried.")
@click.option("--seed", default=shares.SEED, help="Which points these are.")
def die(points: tuple[str, ...], share: float, seed: int) -> None:
    """Kill the service at every call that changes anything, and again during the restart."""
    chosen = [deaths.point(each) for each in points]
    tally = deaths.sweep(share, seed, chosen, tell=click.echo)
    sys.exit(bool(tally.failed))


@main.command("power")
@click.option("--share", default=1.0, help="Which part of the images is looked at.")
@click.option("--seed", default=shares.SEED, help="Where the power is cut.")
def cut(share: float, seed: int) -> None:
    """Cut the power, and see that nothing acknowledged un-happens."""
    if (why := power.unavailable()) is not None:
        raise click.ClickException(why)
    sys.exit(bool(power.cuts(share, seed, tell=click.echo).failed))


if __name__ == "__main__":
    main()
