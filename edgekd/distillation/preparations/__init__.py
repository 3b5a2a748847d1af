"""What is done to a teacher before it teaches, one file each (`edgekd.distillation.points.Preparation`)."""
