package fuzz

import (
	"io"
	"log"
	"runtime"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// One reader of packets and two more, as netstack.Config asks.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 3))
	log.SetOutput(io.Discard) // x/net tells the world of each protocol error
	goleak.VerifyTestMain(m)
}
