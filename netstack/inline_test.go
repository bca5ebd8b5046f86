package netstack

import (
	"crypto/sha256"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What is mirrored or called by linkname, and the hash of its source in the
// gVisor this was checked against. After an upgrade: read the functions anew,
// make finish say what handleConnected says, then write the new hash down.
var mirrored = []struct{ file, name, hash string }{
	{"dispatcher.go", "handleConnecting", "cd47aecb53ee53a4"},
	{"forwarder.go", "CreateEndpoint", "9ef85427b09f4f0c"},
	{"accept.go", "performHandshake", "36007e45d05fd2b6"},
	{"accept.go", "startHandshake", "7f7b0bb50ca91216"},
	{"segment.go", "newIncomingSegment", "c907d954c1ed4af8"},
	{"connect.go", "parseSynSegmentOptions", "d2139a140d578965"},
	{"connect.go", "processSegments", "75e8804d358da338"},
	{"connect.go", "handshakeFailed", "eb05bf423059b6ee"},
	{"endpoint.go", "connecting", "5be16e621076cc46"},
	{"dispatcher.go", "handleConnected", "12d71c029ac4a4a4"},
	{"dispatcher.go", "startTimeWait", "86498a04110785a8"},
	{"connect.go", "handleSegmentsLocked", "3e0b2a9918fe84f0"},
	{"connect.go", "resetConnectionLocked", "d97552abab627f67"},
	{"connect.go", "drainClosingSegmentQueue", "07ecfa78958cce00"},
	{"connect.go", "timeWaitTimerExpired", "c8b87d26003a9e3d"},
	{"connect.go", "transitionToStateCloseLocked", "dd7411c5c9a2b641"},
	// What untold, finAcked, forgetHandshake and mendWindow mend.
	{"connect.go", "sendRaw", "81b74a6d3decd251"},
	{"rcv.go", "consumeSegment", "fdd9dbc3a0d324cb"},
	{"endpoint.go", "setEndpointState", "145123600fbb6588"},
	{"connect.go", "retransmitHandlerLocked", "a6a2d335e65cb8c0"},
	{"connect.go", "transitionToStateEstablishedLocked", "9a6cdc9bc1985ee7"},
	{"snd.go", "sendData", "7f91df80c4f6bc73"},
	{"snd.go", "maybeSendSegment", "a857ec6bda7907ca"},
	{"snd.go", "updateRTO", "5580931144707fc9"},
	{"snd.go", "sendAck", "b336af7a816602c9"},
	{"rcv.go", "getSendParams", "6550bd3a146163e6"},
	{"endpoint.go", "LockUser", "f7839d6579895c6c"},
	{"endpoint.go", "UnlockUser", "37c87f4aca956e5d"},
	{"endpoint.go", "connected", "b3b2e709ab98cf02"},
	// What initDispatcher and open count on.
	{"dispatcher.go", "init", "ffd98ece95d0b304"},
	{"dispatcher.go", "startLocked", "9beb2b904f290163"},
	{"endpoint.go", "registerEndpoint", "82e38ba811828b3f"},
	{"endpoint.go", "cleanupLocked", "fa820e86e0f4038d"},
}

func TestMirroredFunctionsAreUnchanged(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "gvisor.dev/gvisor/pkg/tcpip/transport/tcp").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dir := strings.TrimSpace(string(out))
	for _, m := range mirrored {
		if got := hashFunc(t, filepath.Join(dir, m.file), m.name); got != m.hash {
			t.Errorf("%s of gVisor's %s has changed: hash %s, want %s", m.name, m.file, got, m.hash)
		}
	}
}

func hashFunc(t *testing.T, path, name string) string {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == name {
			var b strings.Builder
			if err := format.Node(&b, fset, fn); err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("%x", sha256.Sum256([]byte(b.String())))[:16]
		}
	}
	t.Fatalf("no function %s in %s", name, filepath.Base(path))
	return ""
}
