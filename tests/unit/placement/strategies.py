"""Steps and tables as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_saguaro.messages import Admit, Noise, Outcome, Release, Sampling, Stamp, Step, Want
from vllm_saguaro.placement.wire import Limits

INT32 = 2**31 - 1
counts = st.integers(0, INT32)
rounds = st.integers(0, 2**63 - 1)
fractions = st.floats(0, 1, width=32)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 1e6, width=32),
    top_k=counts,
    top_p=fractions,
    min_p=fractions,
    noise=st.sampled_from(Noise),
    seed=st.integers(-(2**63), 2**63 - 1),
    prompt_length=counts,
)


@st.composite
def steps_within(draw: st.DrawFn, limits: Limits) -> Step:
    """Steps that are as large as they may be, but for their length."""
    stamps = st.builds(Stamp, st.integers(0, limits.slots - 1), counts, rounds)
    depths = st.integers(0, limits.num_speculative_tokens)
    admits = st.builds(Admit, stamps, samplings, st.lists(counts, max_size=20).map(tuple))
    wants = st.builds(Want, stamps, depths, counts, depths)
    drafts = st.lists(counts, max_size=min(20, limits.num_speculative_tokens)).map(tuple)
    found = st.tuples(stamps, depths, counts, counts, drafts, depths)
    # No more are accepted than were verified.
    outcomes = found.map(lambda o: Outcome(o[0], min(o[1], o[5]), o[2], o[3], o[4], max(o[1], o[5])))
    return Step(
        draw(st.lists(admits, max_size=4)),
        draw(st.lists(wants, max_size=4)),
        draw(st.lists(outcomes, max_size=4)),
        draw(st.lists(st.builds(Release, stamps), max_size=4)),
    )


steps = steps_within(Limits())
