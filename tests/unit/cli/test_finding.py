from __future__ import annotations

from vllm_saguaro.cli.finding import Level, as_text, ok, refused, warning


def test_lines_are_aligned_and_advice_stands_below() -> None:
    text = as_text([ok("cores", "two"), warning("a longer one", "not well", "do this")])
    assert text.splitlines() == [
        "ok       cores         two",
        "warning  a longer one  not well",
        "                       -> do this",
    ]


def test_the_advice_of_a_refusal_is_what_follows_its_last_colon() -> None:
    found = refused("start", 'placement "ray" needs Ray (not here): pip install it')
    assert (found.level, found.text, found.advice) == (
        Level.ERROR,
        'placement "ray" needs Ray (not here)',
        "pip install it",
    )
    found = refused("start", 'placement "ray" needs Ray: pip install it, or write "placement": "process"')
    assert (found.text, found.advice) == (
        'placement "ray" needs Ray',
        'pip install it, or write "placement": "process"',
    )
    assert refused("start", 'this is "xpu": write another').advice == "write another"
    assert refused("start", 'not "": write {"branches": 4, "adaptive": true}').text == 'not ""'
    assert refused("start", "they do not match; choose another").advice == "choose another"
    assert refused("start", "it is so").text == "it is so"
