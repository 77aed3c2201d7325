"""From finished runs to answers: laws of scaling, comparisons of parts. Numbers and findings, no words."""
