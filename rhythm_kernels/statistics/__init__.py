"""The statistics of one layer's attention: three calls (`api`), one layout, two backends, and the check of the map."""
