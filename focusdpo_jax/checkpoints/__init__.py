"""Weight files of other projects, to and from our parameter trees."""
