"""What decides on stages and weights over time, one file each (`edgekd.distillation.points.Controller`)."""
