package soak

import (
	"time"

	"github.com/ztun/ztun/tun/tuntest"
)

const ms = time.Millisecond

// A weather is what a wire does, and the load that it can carry.
type weather struct {
	name    string
	ab, ba  tuntest.Path
	load    measure
	workers int
}

// both is a weather with the same path both ways.
func both(name string, p tuntest.Path, load measure, workers int) weather {
	return weather{name, p, p, load, workers}
}

// Loads, for paths that carry much, a few MB/s, or less.
var (
	heavy  = measure{bulk: 16 << 20, rest: 2 * time.Second, idle: 5 * time.Second}
	medium = measure{bulk: 2 << 20, rest: 2 * time.Second, idle: 5 * time.Second}
	light  = measure{bulk: 256 << 10, rest: 2 * time.Second, idle: 5 * time.Second}
)

// weathers of a wire.
var weathers = []weather{
	both("clear, super-segments whole", tuntest.Path{}, heavy, 32),
	both("clear, cut", tuntest.Path{Cut: true}, heavy, 24),
	both("0.1 % lost", tuntest.Path{Cut: true, Loss: 0.001}, heavy, 24),
	both("1 % lost, 1 ms", tuntest.Path{Cut: true, Loss: 0.01, Delay: ms / 2}, medium, 24),
	both("3 % lost", tuntest.Path{Cut: true, Loss: 0.03}, medium, 16),
	both("3 % lost, 20 ms", tuntest.Path{Cut: true, Loss: 0.03, Delay: 10 * ms}, light, 12),
	both("5 % late, 1 ms", tuntest.Path{Cut: true, Reorder: 0.05, Delay: ms / 2}, medium, 24),
	both("super-segments lost, late and doubled", tuntest.Path{Loss: 0.01, Reorder: 0.05, Duplicate: 0.02}, medium, 24),
	both("all of it, jitter", tuntest.Path{Cut: true, Loss: 0.005, Reorder: 0.02, Duplicate: 0.01, Delay: 2 * ms, Jitter: 3 * ms}, medium, 16),
	both("20 ms, 8 MB/s", tuntest.Path{Cut: true, Delay: 10 * ms, Rate: 8 << 20}, medium, 16),
	both("8 MB/s, short queue", tuntest.Path{Cut: true, Rate: 8 << 20, Queue: 32 << 10}, medium, 16),
	{"2 % of one way lost", tuntest.Path{Cut: true, Loss: 0.02, Delay: ms}, tuntest.Path{Cut: true, Delay: ms}, medium, 16},
	{"5 % of the other way lost", tuntest.Path{Cut: true}, tuntest.Path{Cut: true, Loss: 0.05}, medium, 16},
}

// isHarsh says that a packet that is sent once need not come, or in its place.
func isHarsh(p tuntest.Path) bool { return p.Loss > 0 || p.Reorder > 0 || p.Rate > 0 }

// calm is for worlds without a wire.
var calm = both("no wire", tuntest.Path{}, heavy, 32)
