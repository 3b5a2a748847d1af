"""Losses between student and teacher, one file each (`edgekd.distillation.points.Objective`)."""
