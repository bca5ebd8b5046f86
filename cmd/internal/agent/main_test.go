package agent

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/ztun/ztun/tun/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(checked{m}) }

// checked fails the run if a goroutine is left.
type checked struct{ m *testing.M }

func (c checked) Run() int {
	code := c.m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			println(err.Error())
			return 1
		}
	}
	return code
}
