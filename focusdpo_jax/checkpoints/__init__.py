"""Names and layouts of other people's weight files, to and from our parameter trees."""
