"""Which student is worth training, one file each (`edgekd.distillation.points.Proposer`)."""
