"""The search for the best mixture: what is asked, proposals, rounds of measuring, the answer."""
