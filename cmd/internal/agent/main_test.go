package agent

import (
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainLeaks(m) }
