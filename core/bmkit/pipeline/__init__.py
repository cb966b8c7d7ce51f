"""Running stages, alone and in a row. Joins the engines, which never see each other."""
