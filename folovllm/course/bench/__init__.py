"""The bench: seeded workloads, run by the milestones and by Hugging Face, measured side by side on one machine.

Read in this order: `workloads.py` (requests), `engines.py` and `peers.py` (systems), `record.py` (the results of a
run), `machine.py` and `roofline.py` (the machine's limits), `runner.py` (rounds), `report.py` (medians).
"""
