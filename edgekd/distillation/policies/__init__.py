"""Which photos are drawn, in which view, mixed how, one file each (`edgekd.distillation.points.Policy`)."""
