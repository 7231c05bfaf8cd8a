"""From a folder and a number of minutes to a recipe: what is there, how fast it goes, which rules follow."""
