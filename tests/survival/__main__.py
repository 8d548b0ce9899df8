"""The whole of the harness by hand: `python -m tests.survival --help`. The tests run a share of each part."""

import sys

import click

from tests.survival import deaths, errors, mutants, power, shares, soak


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


@main.command("errors")
@click.argument("points", nargs=-1, metavar="[SCENARIO:CALL:ERROR:once|lasting]...")
@click.option("--number", default=500, help="How many points are tried.")
@click.option("--seed", default=shares.SEED, help="Which points these are.")
def fail(points: tuple[str, ...], number: int, seed: int) -> None:
    """Have the disk fail, with an error at any call that changes anything, once or for a while."""
    chosen = [errors.point(each) for each in points]
    sys.exit(bool(errors.sweep(number, seed, chosen, tell=click.echo).failed))


@main.command("power")
@click.option("--share", default=1.0, help="Which part of the images is looked at.")
@click.option("--seed", default=shares.SEED, help="Where the power is cut.")
def cut(share: float, seed: int) -> None:
    """Cut the power, and see that nothing acknowledged un-happens."""
    if (why := power.unavailable()) is not None:
        raise click.ClickException(why)
    sys.exit(bool(power.cuts(share, seed, tell=click.echo).failed))


@main.command("soak")
@click.option("--minutes", default=30.0, help="How long.")
@click.option("--seed", default=shares.SEED, help="Which faults, in which order.")
@click.option("--viewers", default=50, help="How many watch at once.")
def endure(minutes: float, seed: int, viewers: int) -> None:
    """Have sessions, viewers and faults all at once for a long time."""
    plan = soak.Plan(seconds=60 * minutes, seed=seed, viewers=viewers)
    sys.exit(bool(soak.soak(plan, tell=click.echo).wrong))


@main.command("mutants")
@click.argument(
    "names", nargs=-1, metavar="[NAME]...", type=click.Choice([*mutants.CONTROLS, *mutants.MUTANTS])
)
def plant(names: tuple[str, ...]) -> None:
    """Plant bugs in copies of the product, one in each, and see that every one is found."""
    sys.exit(not all(trial.fine for trial in mutants.sweep(names, tell=click.echo)))


if __name__ == "__main__":
    main()
