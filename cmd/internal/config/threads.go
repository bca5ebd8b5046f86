package config

import (
	"fmt"
	"strconv"
	"strings"
)

// cpus is what is known about the CPUs that the proxy may use.
type cpus struct {
	host    int // What the machine, or the quota of our cgroup, gives.
	count   int // CPU_LIMIT of the downward API; 0: not said.
	limit   int // Resource limit; 0: none.
	request int // Resource request; 0: none.
}

func (c cpus) total() int {
	switch {
	case c.limit > 0:
		return c.limit
	case c.count > 0:
		return c.count
	}
	return c.host
}

// workers is ztunnel's rule for the number of its worker threads, but for two
// CPUs or fewer: they are the apps' too, and a second reader then only brings
// wake-ups between the two (a fifth of a request's CPU within a node). setting
// is ZTUNNEL_WORKER_THREADS, concurrency the mesh configuration's.
func workers(setting string, concurrency *int, c cpus) (int, error) {
	if setting != "" {
		return parseWorkers(setting, c.total())
	}
	switch {
	case concurrency != nil && *concurrency > 0:
		return *concurrency, nil
	case concurrency != nil:
		return max(c.total(), 1), nil
	case c.limit > 0:
		return max(c.limit, c.request, 1), nil
	}
	if c.total() <= 2 {
		return max(c.request, 1), nil
	}
	return max((c.total()+3)/4, c.request, 2), nil
}

// parseWorkers reads a number, 0 for all CPUs, or a percentage of them.
func parseWorkers(s string, total int) (int, error) {
	if percent, ok := strings.CutSuffix(s, "%"); ok {
		n, err := strconv.ParseUint(percent, 10, 8)
		if err != nil || n == 0 || n > 100 {
			return 0, fmt.Errorf("%q is not a percentage from 1%% to 100%%", s)
		}
		return max((total*int(n)+99)/100, 1), nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("%q is neither a number nor a percentage", s)
	}
	if n == 0 {
		return max(total, 1), nil
	}
	return int(n), nil
}
