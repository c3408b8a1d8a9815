"""Measurements of what the optimizers do, and the demo: needs the extra ``emonavi[demo]``, most of it ``[bench]``."""
