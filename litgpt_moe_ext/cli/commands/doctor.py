"""`litgpt-moe doctor`."""

from pathlib import Path


def doctor(recipe: Path | None = None) -> int:
    """One page about this installation, and whether a recipe can run on it; fails if it cannot.

    Args:
        recipe: A recipe (YAML file), or a checkpoint directory. Default: look at the installation only.
    """
    import litgpt_moe_ext

    litgpt_moe_ext.register()
    from rich.console import Console
    from rich.markup import escape

    from litgpt_moe_ext.inspect.cost.doctor import examine
    from litgpt_moe_ext.inspect.recipes import load_recipe

    findings = examine(None if recipe is None else load_recipe(recipe))
    styles = {"good": ("green", "ok"), "note": ("yellow", "note"), "problem": ("bold red", "PROBLEM")}
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        style, word = styles[finding.verdict]
        console.print(f"[{style}]{word:<8}[/] {finding.topic:<16} {escape(finding.text)}")
    problems = sum(finding.verdict == "problem" for finding in findings)
    if recipe is None:
        return 0
    print(
        f"{recipe} cannot run here: {problems} problem{'s' * (problems > 1)}" if problems else f"{recipe} can run here"
    )
    return 1 if problems else 0
