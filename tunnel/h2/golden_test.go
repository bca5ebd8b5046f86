package h2

import (
	"io"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

// What a stock ztunnel was seen to send in either role, frame by frame. Ours
// must look the same to a peer.

func TestClientSpeaksAsZtunnel(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.want("setup",
			"preface",
			"SETTINGS ENABLE_PUSH=0 INITIAL_WINDOW_SIZE=4194304 MAX_FRAME_SIZE=1048576 MAX_HEADER_LIST_SIZE=16384",
			"WINDOW_UPDATE +16711681")
		var s *testStream
		tc.do(func() {
			st, err := tc.conn.Open(Request{Authority: "10.0.0.2:8080", Headers: []Header{
				{Name: "baggage", Value: "k8s.cluster.name=Kubernetes,k8s.namespace.name=default"},
				{Name: "forwarded", Value: `for="10.0.0.1:42494"`, Once: true},
				{Name: "traceparent", Value: "00-de2125704fb28b9e70a719a9fdae6244-0c0778d787e993a7-00", Once: true},
			}}, func(r Response, err error) { s.response = append(s.response, r) })
			if err != nil {
				t.Fatal(err)
			}
			s = tc.track(st)
		})
		tc.want("the CONNECT",
			`HEADERS 1 :method=CONNECT :authority=10.0.0.2:8080 baggage=k8s.cluster.name=Kubernetes,k8s.namespace.name=default forwarded=for="10.0.0.1:42494" traceparent=00-de2125704fb28b9e70a719a9fdae6244-0c0778d787e993a7-00`)
		tc.fr.WriteSettings()
		tc.want("peer's settings", "SETTINGS ACK")
		tc.fr.WriteSettingsAck()
		tc.headers(1, false, ":status", "200", "baggage", "b")
		if len(s.response) != 1 || s.response[0].Status != 200 || s.response[0].Header("baggage") != "b" || s.response[0].EndStream {
			t.Fatalf("response %+v", s.response)
		}
		s.write("abc")
		s.closeWrite()
		tc.want("data and half-close", `DATA 1 "abc"`, `DATA 1 "" END_STREAM`)
		tc.fr.WriteData(1, false, []byte("answer"))
		tc.fr.WriteData(1, true, nil)
		s.wantRead("answer", io.EOF)
		pass(10 * time.Second)
		tc.want("10 s of silence", "PING 3b7cdb7a0b8716b4")
		tc.fr.WritePing(true, keepalivePing)
		pass(10*time.Second - 1)
		tc.want("not yet")
		pass(1)
		tc.want("10 s after the pong", "PING 3b7cdb7a0b8716b4")
	}, asClient, asZtunnel)
}

func TestServerSpeaksAsZtunnel(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.want("setup",
			"SETTINGS MAX_CONCURRENT_STREAMS=200 INITIAL_WINDOW_SIZE=4194304 MAX_FRAME_SIZE=1048576 MAX_HEADER_LIST_SIZE=65536",
			"WINDOW_UPDATE +16711681")
		tc.raw(clientPreface)
		tc.fr.WriteSettings()
		tc.want("peer's settings", "SETTINGS ACK")
		tc.fr.WriteSettingsAck()
		for _, refusal := range []struct {
			id     uint32
			status int
			want   string
		}{{1, 400, "400"}, {3, 401, "401"}, {5, 503, "503"}} {
			s := tc.connect(refusal.id)
			s.respond(refusal.status, true)
			id := " " + string('0'+rune(refusal.id))
			tc.want("refusal", "HEADERS"+id+" END_STREAM :status="+refusal.want, "RST_STREAM"+id+" NO_ERROR")
			tc.do(s.s.Close)
			tc.want("after Close")
		}
		s := tc.connect(7)
		s.respond(200, false, "baggage", "k8s.cluster.name=Kubernetes")
		tc.want("acceptance", "HEADERS 7 :status=200 baggage=k8s.cluster.name=Kubernetes")
		s.write("answer")
		s.closeWrite()
		tc.want("data and half-close", `DATA 7 "answer"`, `DATA 7 "" END_STREAM`)
		pass(10 * time.Second)
		tc.want("10 s of silence", "PING 3b7cdb7a0b8716b4")
	}, asZtunnel)
}

func TestServerGivesUpSilentPeerAsZtunnel(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		pass(10 * time.Second)
		tc.want("keepalive", "PING 3b7cdb7a0b8716b4")
		pass(20*time.Second - 1)
		tc.want("not yet")
		pass(1)
		tc.want("no pong for 20 s", "GOAWAY last=1 NO_ERROR")
		tc.wantClosed(ErrPingTimeout)
		s.wantRead("", splice.ErrReset)
	})
}

func TestRefusalReachesClient(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.open()
		tc.skip(1)
		tc.headers(1, true, ":status", "401", "proxy-status", "x")
		tc.fr.WriteRSTStream(1, 0)
		if len(s.response) != 1 || s.response[0].Status != 401 || !s.response[0].EndStream {
			t.Fatalf("response %+v, errors %v", s.response, s.respErr)
		}
		s.wantRead("", io.EOF)
		tc.do(func() {
			if _, err := s.s.Write([]byte("x")); err == nil {
				t.Error("Write after a refusal succeeded")
			}
			s.s.Close()
		})
		tc.want("nothing is left to be said")
		if n := tc.conn.Streams(); n != 0 {
			t.Errorf("%d streams open", n)
		}
		if len(s.response)+len(s.respErr) != 1 {
			t.Errorf("onResponse ran %d times", len(s.response)+len(s.respErr))
		}
	}, asClient)
}
