"""Damaged inputs and killed processes: every loss and every wrong answer is a finding."""
