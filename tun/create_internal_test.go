package tun

import "testing"

func TestLastMapped(t *testing.T) {
	for _, c := range []struct {
		uidMap string
		want   int
	}{
		{"         0          0 4294967295\n", 4294967294},
		{"         0      65534          1\n", 0},
		{"0 1000 1\n1 100000 65536\n", 65536},
		{"", 0},
		{"0 0\nx y z\n", 0},
	} {
		if got := lastMapped(c.uidMap); got != c.want {
			t.Errorf("lastMapped(%q) = %d, want %d", c.uidMap, got, c.want)
		}
	}
}
