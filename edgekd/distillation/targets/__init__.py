"""What the student learns instead of the plain output of its teacher, one file each (`edgekd.distillation.points.Target`)."""
