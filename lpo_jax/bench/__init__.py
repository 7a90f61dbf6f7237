"""`lpo bench`: how fast sampling, the gradient and a whole step run, beside what this machine could do."""
