"""The race of a search's best trials and the default with new seeds: is the winner better?"""
