"""The statistics of one layer's attention: three public calls (`api`), two backends, and the check of the map."""
