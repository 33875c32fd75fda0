"""The parts of bench_engine.py: who is measured (servers, peers), with what load (loads, offline, step_cost), and what
it says (results)."""
