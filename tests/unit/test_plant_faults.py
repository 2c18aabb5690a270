"""The planted faults: each still has its place in the code, and the tool tells caught from survived."""

from dataclasses import replace

import pytest

from tools import plant_faults
from tools.plant_faults import FAMILIES, FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_every_fault_is_found_exactly_once(fault: Fault) -> None:
    """A fault whose text has moved on would be planted nowhere, and its tests never tried again."""
    text = plant_faults.planted(fault, ROOT)
    assert text != (ROOT / fault.file).read_text(encoding="utf-8")
    compile(text, fault.file, "exec")


def test_a_text_that_is_not_found_exactly_once_is_refused() -> None:
    for old in ("nowhere to be found", "self"):
        with pytest.raises(ValueError, match=r"not once; bring tools/plant_faults\.py up to date"):
            plant_faults.planted(replace(FAULTS[0], old=old), ROOT)


def test_names_are_unique_and_every_family_has_tests_and_a_fault() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.family for fault in FAULTS} == set(FAMILIES)
    assert all((ROOT / file).is_file() for files in FAMILIES.values() for file in files)


@pytest.mark.slow
def test_a_fault_is_caught_a_harmless_change_survives_and_a_broken_copy_is_neither() -> None:
    """The tool itself: were the installed pctt imported instead of the copy, every fault would survive."""
    fault = Fault("", "record", "pctt/record.py", 'record["step"] > step', 'record["step"] >= step')
    assert plant_faults.plant(fault)[0] == "caught"
    assert plant_faults.plant(replace(fault, new='step < record["step"]'))[0] == "SURVIVED"
    assert plant_faults.plant(replace(fault, new="("))[0] == "BROKEN"


def test_the_list_names_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert plant_faults.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f.name for f in FAULTS]
    assert plant_faults.main(["--only", "no such fault"]) == 2
