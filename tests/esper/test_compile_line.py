"""Who compiles what: the law of the line before the workers."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import KernelSignature
from esper.tezzeret import CompileJob, load_blueprint
from esper.tezzeret._line import WORTH_SHARING, Line, program_of

SIGNATURES = [KernelSignature(input_shape=(n,), output_shape=(n,)) for n in range(1, 5)]


def job(program: int, seed: int = 0) -> CompileJob:
    return CompileJob(load_blueprint("low_rank"), SIGNATURES[program], init_seed=seed)


@given(st.lists(st.integers(0, 3), max_size=90), st.integers(1, 4), st.randoms())
def test_every_job_is_given_once_and_workers_share_long_groups_alone(programs, workers, random):
    jobs = [job(program, seed) for seed, program in enumerate(programs)]
    line, given_out, at, last = Line(jobs), [], {}, [None] * workers
    while line or at:
        for worker in range(workers):
            if worker in at:
                continue
            others = Counter(program_of(ticket.job) for ticket in at.values())
            before = Counter(program_of(j) for j in jobs)
            before.subtract(program_of(j) for j in given_out)
            ticket = line.take(last[worker], others)
            if ticket is None:
                assert worker != 0 or at, "a job waits and nobody works"
                continue
            program = program_of(ticket.job)
            if others[program] and program != last[worker]:
                assert before[program] >= WORTH_SHARING * (1 + others[program])
            at[worker], last[worker] = ticket, program
            given_out.append(ticket.job)
        del at[random.choice(sorted(at))]
    assert Counter(j.init_seed for j in given_out) == Counter(j.init_seed for j in jobs)
    for program in {program_of(j) for j in jobs}:
        seeds = [j.init_seed for j in given_out if program_of(j) == program]
        assert seeds == sorted(seeds)


def test_what_is_put_back_comes_next():
    line = Line([job(0, 1), job(0, 2), job(1, 3)])
    first = line.take(None, {})
    assert first is not None
    line.put_back(first._replace(attempt=2))
    assert len(line) == 3
    assert line.take(program_of(first.job), {}) == (first.job, 2)


def test_jobs_are_of_one_program_when_their_parameters_alone_differ():
    assert program_of(job(0, 1)) == program_of(job(0, 2)) != program_of(job(1, 1))
    wide = CompileJob(load_blueprint("low_rank"), SIGNATURES[0], {"rank": 2})
    assert program_of(wide) != program_of(job(0))
