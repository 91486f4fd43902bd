"""Every campaign that is promised has run, with the counts that are promised."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import datetime

from helpers.campaigns import PLACES, PROMISED, file_of, lacking
from helpers.paths import ROOT
from peft_sapt.compat import TESTED, numbers_of


def faults_of(name: str) -> list[str]:
    """What is wrong with the record of a campaign."""
    if not file_of(name).is_file():
        return [f"{name}: never ran; python -m pytest -m campaign {PLACES[name]}"]
    found = json.loads(file_of(name).read_text(encoding="utf-8"))
    faults = lacking(name, found["counts"])
    if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"]):
        faults.append(f"{name}: {found['commit']} is no commit")
    if datetime.fromisoformat(found["date"]).utcoffset() is None:
        faults.append(f"{name}: {found['date']} has no time zone")
    if found["campaign"] != name or found["seconds"] < 0 or not {"python", "torch", "peft"} <= set(found["versions"]):
        faults.append(f"{name}: its record is incomplete")
    return faults


def test_every_promised_campaign_has_run() -> None:
    faults = [fault for name in PROMISED for fault in faults_of(name)]
    assert not faults, "\n" + "\n".join(faults)


def test_the_versions_that_are_promised_have_run() -> None:
    """Lowest, highest and in between, with no failure, and the guide shows them."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    rows = json.loads(versions.FILE.read_text(encoding="utf-8"))
    guide = versions.GUIDE.read_text(encoding="utf-8")
    assert versions.with_table(guide, rows) == guide
    assert not [r for r in rows if r["counts"]["failed"] or r["counts"]["error"] or r["counts"]["passed"] < 1900]
    for library, (lowest, highest) in TESTED.items():
        found = [numbers_of(row["versions"][library.__name__]) for row in rows]
        assert min(found)[: len(lowest)] == lowest and max(found)[:2] == highest[:2], library
    pairs = {(numbers_of(row["versions"]["python"])[1], numbers_of(row["versions"]["torch"])[:2]) for row in rows}
    assert {(11, (2, 6)), (12, (2, 6)), (13, (2, 15)), (11, (2, 15))} <= pairs


def test_every_campaign_has_its_test() -> None:
    assert set(PLACES) == set(PROMISED)
    for name, place in PLACES.items():
        text = (ROOT / place).read_text(encoding="utf-8")
        assert f'campaign("{name}")' in text and "@pytest.mark.campaign" in text, place
