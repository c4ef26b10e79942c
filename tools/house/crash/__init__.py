"""`tools/dev crash`: machines that are killed while their guests write, and what is on their disks then."""
