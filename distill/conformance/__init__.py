"""Conformance of distillation losses: does a loss, ours or another project's, have one of the known defects?

    python -m distill.conformance --target my.module:loss

From Python: distill.conformance.suite.run. What a loss must look like: distill.conformance.target.
"""
