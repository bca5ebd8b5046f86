package h2

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// frame makes a frame of any kind, valid or not.
func frame(kind http2.FrameType, flags http2.Flags, id uint32, payload ...byte) []byte {
	b := make([]byte, frameHeadLen, frameHeadLen+len(payload))
	putFrameHead(b, len(payload), kind, flags, id)
	return append(b, payload...)
}

func head(n int, kind http2.FrameType, flags http2.Flags, id uint32) []byte {
	b := make([]byte, frameHeadLen)
	putFrameHead(b, n, kind, flags, id)
	return b
}

func setting(id http2.SettingID, v uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, uint16(id)), v)
}

// Each of these ends the connection with GOAWAY and the code. Stream 1 is open.
func TestConnectionErrors(t *testing.T) {
	tests := []struct {
		name  string
		bytes []byte
		code  Code
		role  string // "", "client" or "server"
	}{
		{"data on stream 0", frame(http2.FrameData, 0, 0, 'x'), CodeProtocol, ""},
		{"headers on stream 0", frame(http2.FrameHeaders, 4, 0, 0x82), CodeProtocol, ""},
		{"priority on stream 0", frame(http2.FramePriority, 0, 0, 0, 0, 0, 0, 0), CodeProtocol, ""},
		{"reset of stream 0", frame(http2.FrameRSTStream, 0, 0, 0, 0, 0, 0), CodeProtocol, ""},
		{"settings on a stream", frame(http2.FrameSettings, 0, 1), CodeProtocol, ""},
		{"ping on a stream", frame(http2.FramePing, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0), CodeProtocol, ""},
		{"goaway on a stream", frame(http2.FrameGoAway, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0), CodeProtocol, ""},
		{"push promise", frame(http2.FramePushPromise, 4, 1, 0, 0, 0, 2, 0x82), CodeProtocol, ""},
		{"frame too long", head(1<<20+1, http2.FrameData, 0, 1), CodeFrameSize, ""},
		{"short reset", frame(http2.FrameRSTStream, 0, 1, 0), CodeFrameSize, ""},
		{"short ping", frame(http2.FramePing, 0, 0, 0), CodeFrameSize, ""},
		{"long ping", frame(http2.FramePing, 0, 0, make([]byte, 9)...), CodeFrameSize, ""},
		{"very long ping", head(10000, http2.FramePing, 0, 0), CodeFrameSize, ""},
		{"short window update", frame(http2.FrameWindowUpdate, 0, 0, 0, 0, 1), CodeFrameSize, ""},
		{"short goaway", frame(http2.FrameGoAway, 0, 0, 0, 0, 0, 1), CodeFrameSize, ""},
		{"odd settings", frame(http2.FrameSettings, 0, 0, 0, 1, 0), CodeFrameSize, ""},
		{"very long settings", head(6*1000, http2.FrameSettings, 0, 0), CodeFrameSize, ""},
		{"settings ack with payload", frame(http2.FrameSettings, 1, 0, setting(1, 1)...), CodeFrameSize, ""},
		{"window of 2^31", frame(http2.FrameSettings, 0, 0, setting(http2.SettingInitialWindowSize, 1<<31)...), CodeFlowControl, ""},
		{"max frame size too small", frame(http2.FrameSettings, 0, 0, setting(http2.SettingMaxFrameSize, 1<<14-1)...), CodeProtocol, ""},
		{"max frame size too large", frame(http2.FrameSettings, 0, 0, setting(http2.SettingMaxFrameSize, 1<<24)...), CodeProtocol, ""},
		{"enable push 2", frame(http2.FrameSettings, 0, 0, setting(http2.SettingEnablePush, 2)...), CodeProtocol, ""},
		{"enable push from a server", frame(http2.FrameSettings, 0, 0, setting(http2.SettingEnablePush, 1)...), CodeProtocol, "client"},
		{"connection window update of 0", frame(http2.FrameWindowUpdate, 0, 0, 0, 0, 0, 0), CodeProtocol, ""},
		{"connection window overflow", frame(http2.FrameWindowUpdate, 0, 0, 0x7f, 0xff, 0xff, 0xff), CodeFlowControl, ""},
		{"stream window overflow by settings", append(frame(http2.FrameWindowUpdate, 0, 1, 0x7f, 0xff, 0, 0),
			frame(http2.FrameSettings, 0, 0, setting(http2.SettingInitialWindowSize, 1<<31-1)...)...), CodeFlowControl, ""},
		{"data on an idle stream", frame(http2.FrameData, 0, 9, 'x'), CodeProtocol, ""},
		{"reset of an idle stream", frame(http2.FrameRSTStream, 0, 9, 0, 0, 0, 0), CodeProtocol, ""},
		{"window update on an idle stream", frame(http2.FrameWindowUpdate, 0, 9, 0, 0, 0, 1), CodeProtocol, ""},
		{"reset of an even stream", frame(http2.FrameRSTStream, 0, 2, 0, 0, 0, 0), CodeProtocol, ""},
		{"padding longer than the frame", frame(http2.FrameData, 8, 1, 5, 0, 0), CodeProtocol, ""},
		{"padded without length", frame(http2.FrameData, 8, 1), CodeFrameSize, ""},
		{"headers padding longer than the frame", frame(http2.FrameHeaders, 4|8, 3, 200, 0x82), CodeProtocol, "server"},
		{"continuation alone", frame(http2.FrameContinuation, 4, 1, 0x82), CodeProtocol, ""},
		{"interrupted header block", append(frame(http2.FrameHeaders, 0, 3, 0x82), frame(http2.FramePing, 0, 0, make([]byte, 8)...)...), CodeProtocol, ""},
		{"unknown frame in a header block", append(frame(http2.FrameHeaders, 0, 3, 0x82), frame(0x77, 0, 3)...), CodeProtocol, ""},
		{"continuation of another stream", append(frame(http2.FrameHeaders, 0, 3, 0x82), frame(http2.FrameContinuation, 4, 5, 0x82)...), CodeProtocol, ""},
		{"broken header compression", frame(http2.FrameHeaders, 4, 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), CodeCompression, "server"},
		{"truncated header compression", frame(http2.FrameHeaders, 4, 3, 0x40, 0x0a, 'a'), CodeCompression, "server"},
		{"even stream opened", frame(http2.FrameHeaders, 4, 4, 0x82), CodeProtocol, "server"},
		{"stream opened by a server", frame(http2.FrameHeaders, 4, 2, 0x88), CodeProtocol, "client"},
		{"response on an idle stream", frame(http2.FrameHeaders, 4, 7, 0x88), CodeProtocol, "client"},
		{"goaway with a higher stream", append(frame(http2.FrameGoAway, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0), frame(http2.FrameGoAway, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0)...), CodeProtocol, ""},
	}
	for _, test := range tests {
		for _, role := range []string{"client", "server"} {
			if test.role != "" && test.role != role {
				continue
			}
			t.Run(role+"/"+test.name, func(t *testing.T) {
				var opts []testOption
				if role == "client" {
					opts = append(opts, asClient)
				}
				run(t, func(tc *testConn) {
					tc.greet()
					var s *testStream
					if role == "client" {
						s = tc.opened()
					} else {
						s = tc.accept(1)
					}
					tc.raw(test.bytes)
					tc.wantConnError(test.code, "")
					if _, err := s.read(); err == nil {
						t.Error("the stream lives on")
					}
				}, opts...)
			})
		}
	}
}

func TestFirstFrameMustBeSettings(t *testing.T) {
	for name, first := range map[string][]byte{
		"ping": frame(http2.FramePing, 0, 0, make([]byte, 8)...),
		"ack":  frame(http2.FrameSettings, 1, 0),
		"data": frame(http2.FrameData, 0, 1, 'x'),
	} {
		for role, opt := range map[string]testOption{"client": asClient, "server": func(*Config) {}} {
			t.Run(role+"/"+name, func(t *testing.T) {
				run(t, func(tc *testConn) {
					if role == "server" {
						tc.raw(clientPreface)
					}
					tc.raw(first)
					tc.wantConnError(CodeProtocol, "")
				}, opt)
			})
		}
	}
}

func TestPrefaceIsChecked(t *testing.T) {
	for name, bytes := range map[string]string{
		"http/1.1":     "GET / HTTP/1.1\r\n\r\n",
		"tls":          "\x16\x03\x01\x02\x00",
		"one byte off": "PRI * HTTP/2.0\r\n\r\nSM\r\n\rX",
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.raw([]byte(bytes))
				tc.wantConnError(CodeProtocol, "")
			})
		})
	}
}

func TestSetupHasADeadline(t *testing.T) {
	for name, send := range map[string]func(tc *testConn){
		"nothing sent":    func(tc *testConn) {},
		"half a preface":  func(tc *testConn) { tc.raw(clientPreface[:10]) },
		"no settings":     func(tc *testConn) { tc.raw(clientPreface) },
		"no settings ack": func(tc *testConn) { tc.raw(clientPreface); tc.fr.WriteSettings() },
		"one byte at a time": func(tc *testConn) {
			for _, b := range clientPreface[:9] {
				tc.raw([]byte{b})
				pass(time.Second)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				send(tc)
				pass(DefaultSetupTimeout)
				tc.wantConnError(CodeSettingsTimeout, "")
				tc.wantClosed(ErrSetupTimeout)
			}, noPing)
		})
	}
}

// Each of these ends stream 1, with RST_STREAM and the code, and nothing else.
func TestStreamErrors(t *testing.T) {
	tests := []struct {
		name  string
		bytes []byte
		code  Code
		role  string
	}{
		{"window update of 0", frame(http2.FrameWindowUpdate, 0, 1, 0, 0, 0, 0), CodeProtocol, ""},
		{"window overflow", frame(http2.FrameWindowUpdate, 0, 1, 0x7f, 0xff, 0xff, 0xff), CodeFlowControl, ""},
		{"data past the stream's window", append(head(300<<10, http2.FrameData, 0, 1), make([]byte, 300<<10)...), CodeFlowControl, ""},
		{"data after the end", append(frame(http2.FrameData, 1, 1), frame(http2.FrameData, 0, 1, 'x')...), CodeStreamClosed, ""},
		{"headers after the end", append(frame(http2.FrameData, 1, 1), frame(http2.FrameHeaders, 4|1, 1, 0x88)...), CodeStreamClosed, ""},
		{"trailers", frame(http2.FrameHeaders, 4|1, 1), CodeProtocol, ""},
		{"second headers", frame(http2.FrameHeaders, 4, 1, 0x88), CodeProtocol, ""},
		{"priority of a wrong length", frame(http2.FramePriority, 0, 1, 0), CodeFrameSize, ""},
	}
	for _, test := range tests {
		for _, role := range []string{"client", "server"} {
			t.Run(role+"/"+test.name, func(t *testing.T) {
				var opts []testOption
				if role == "client" {
					opts = append(opts, asClient)
				}
				run(t, func(tc *testConn) {
					tc.greet()
					if role == "client" {
						tc.opened()
					} else {
						tc.accept(1)
					}
					tc.raw(test.bytes)
					tc.want("reset", "RST_STREAM 1 "+test.code.String())
					tc.wantAlive()
					if n := tc.conn.Streams(); n != 0 {
						t.Errorf("%d streams open", n)
					}
				}, opts...)
			})
		}
	}
}

func TestBadResponses(t *testing.T) {
	tests := map[string][]string{
		"no status":             {"baggage", "x"},
		"two statuses":          {":status", "200", ":status", "200"},
		"empty status":          {":status", ""},
		"short status":          {":status", "20"},
		"negative status":       {":status", "-20"},
		"switching protocols":   {":status", "101"},
		"request pseudo header": {":status", "200", ":path", "/"},
		"pseudo after regular":  {"x", "y", ":status", "200"},
		"upper case":            {":status", "200", "Upper", "x"},
		"connection header":     {":status", "200", "connection", "close"},
	}
	for name, kv := range tests {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				s := tc.open()
				tc.skip(1)
				tc.headers(1, false, kv...)
				tc.want("reset", "RST_STREAM 1 PROTOCOL_ERROR")
				if len(s.respErr) != 1 {
					t.Errorf("responses %v, errors %v", s.response, s.respErr)
				}
			}, asClient)
		})
	}
	t.Run("data first", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.open()
			tc.skip(1)
			tc.fr.WriteData(1, false, []byte("x"))
			tc.want("reset", "RST_STREAM 1 PROTOCOL_ERROR")
		}, asClient)
	})
	t.Run("interim with end", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.open()
			tc.skip(1)
			tc.headers(1, true, ":status", "103")
			tc.want("reset", "RST_STREAM 1 PROTOCOL_ERROR")
		}, asClient)
	})
}

func TestRequestsThatTheUserDoesNotSee(t *testing.T) {
	const malformed, bad = "RST_STREAM 1 PROTOCOL_ERROR", "HEADERS 1 END_STREAM :status=400"
	tests := map[string]struct {
		kv   []string
		want string
	}{
		"get":                   {[]string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a"}, bad},
		"post":                  {[]string{":method", "POST", ":scheme", "http", ":path", "/"}, bad},
		"no authority":          {[]string{":method", "CONNECT"}, bad},
		"empty authority":       {[]string{":method", "CONNECT", ":authority", ""}, bad},
		"scheme with connect":   {[]string{":method", "CONNECT", ":scheme", "http", ":authority", "a:1"}, malformed},
		"path with connect":     {[]string{":method", "CONNECT", ":path", "/", ":authority", "a:1"}, malformed},
		"extended connect":      {[]string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/", ":authority", "a"}, malformed},
		"no method":             {[]string{":authority", "a:1"}, malformed},
		"nothing":               {nil, malformed},
		"response":              {[]string{":status", "200"}, malformed},
		"two authorities":       {[]string{":method", "CONNECT", ":authority", "a:1", ":authority", "b:1"}, malformed},
		"unknown pseudo header": {[]string{":method", "CONNECT", ":authority", "a:1", ":odd", "x"}, malformed},
		"pseudo after regular":  {[]string{":method", "CONNECT", "x", "y", ":authority", "a:1"}, malformed},
		"upper case":            {[]string{":method", "CONNECT", ":authority", "a:1", "Upper", "x"}, malformed},
		"line break":            {[]string{":method", "CONNECT", ":authority", "a:1\r\nx: y"}, malformed},
		"connection header":     {[]string{":method", "CONNECT", ":authority", "a:1", "connection", "close"}, malformed},
		"transfer encoding":     {[]string{":method", "CONNECT", ":authority", "a:1", "transfer-encoding", "chunked"}, malformed},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				tc.headers(1, false, test.kv...)
				if test.want == bad {
					tc.want("answer", bad, "RST_STREAM 1 NO_ERROR")
				} else {
					tc.want("answer", malformed)
				}
				if len(tc.streams) != 0 {
					t.Error("the user saw it")
				}
				if n := tc.conn.Stats().BadRequests; n != 1 {
					t.Errorf("BadRequests = %d", n)
				}
				tc.headers(3, true, test.kv...)
				tc.next()
				tc.wantAlive()
				tc.accept(5)
			})
		})
	}
}

func TestHeaderListTooLarge(t *testing.T) {
	big := string(bytes.Repeat([]byte("v"), 9000))
	t.Run("request", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			kv := []string{":method", "CONNECT", ":authority", "a:1"}
			for range 8 {
				kv = append(kv, "x", big)
			}
			tc.headers(1, false, kv...)
			tc.want("answer", "HEADERS 1 END_STREAM :status=431", "RST_STREAM 1 NO_ERROR")
			tc.accept(3)
		})
	})
	t.Run("response", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.open()
			tc.skip(1)
			tc.headers(1, false, ":status", "200", "x", big, "y", big)
			tc.want("answer", "RST_STREAM 1 CANCEL")
			if len(s.respErr) != 1 {
				t.Errorf("errors %v", s.respErr)
			}
			tc.opened()
		}, asClient)
	})
	t.Run("for the peer", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet(http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 1000})
			tc.do(func() {
				_, err := tc.conn.Open(Request{Authority: "a:1", Headers: []Header{{Name: "x", Value: big}}}, func(Response, error) {})
				if err != ErrHeaderList {
					t.Errorf("Open: %v", err)
				}
			})
			tc.want("nothing")
		}, asClient)
	})
}

// A header block larger than a frame goes out as CONTINUATION, and comes in so.
func TestContinuation(t *testing.T) {
	long := string(bytes.Repeat([]byte("v~"), 12000))
	run(t, func(tc *testConn) {
		tc.greet()
		b := tc.block(":method", "CONNECT", ":authority", "a:1", "x", long)
		tc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:10]})
		tc.fr.WriteContinuation(1, false, b[10:20])
		tc.fr.WriteContinuation(1, true, b[20:])
		if len(tc.requests) != 1 || tc.requests[0].Header("x") != long {
			t.Fatal("request did not arrive whole")
		}
		tc.streams[0].respond(200, false, "x", long)
		tc.want("answer", "HEADERS 1 :status=200 x="+long)
	})
}

// The compression state belongs to the connection: what a refused or
// malformed request put there must be known later.
func TestHeaderTableSurvivesRefusals(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.headers(1, false, ":method", "CONNECT", ":authority", "a:1", "connection", "x", "kept", "value")
		tc.skip(1)
		tc.headers(3, false, ":method", "CONNECT", ":authority", "a:1", "kept", "value")
		if len(tc.requests) != 1 || tc.requests[0].Header("kept") != "value" {
			t.Errorf("requests %v", tc.requests)
		}
	})
}

func TestHeaderTableSizeOfPeer(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.fr.ReadMetaHeaders.SetMaxDynamicTableSize(0)
		tc.fr.ReadMetaHeaders.SetAllowedMaxDynamicTableSize(0)
		tc.greet(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
		for id := uint32(1); id < 9; id += 2 {
			tc.connect(id).respond(200, false, "same", "value")
			tc.next()
		}
		tc.headers(9, false, ":method", "CONNECT", ":authority", "a:1")
		tc.streams[4].respond(200, false, "same", "value")
		tc.want("readable without a table", "HEADERS 9 :status=200 same=value")
	})
}

func TestUnknownFramesAndSettingsAreIgnored(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.raw(clientPreface)
		tc.raw(frame(http2.FrameSettings, 0, 0, append(setting(0x1234, 7), setting(http2.SettingEnableConnectProtocol, 1)...)...))
		tc.fr.WriteSettingsAck()
		tc.skip(3)
		tc.raw(frame(0x42, 0xff, 0, 1, 2, 3))
		tc.raw(frame(0x43, 0xff, 77, make([]byte, 70000)...))
		tc.raw(frame(http2.FramePriority, 0, 99, 0, 0, 0, 1, 5))
		tc.wantAlive()
		if n := tc.conn.Stats().FramesIgnored; n != 3 {
			t.Errorf("FramesIgnored = %d", n)
		}
	})
}

// Every split of the same bytes must mean the same.
func TestBytesMayComeOneByOne(t *testing.T) {
	run(t, func(tc *testConn) {
		var b bytes.Buffer
		b.Write(clientPreface)
		fr := http2.NewFramer(&b, nil)
		fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100000})
		fr.WriteSettingsAck()
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: tc.block(":method", "CONNECT", ":authority", "a:1")})
		fr.WriteData(1, false, []byte("abc"))
		fr.WriteDataPadded(1, false, []byte("def"), make([]byte, 5))
		fr.WriteDataPadded(1, false, nil, make([]byte, 5))
		fr.WritePing(false, [8]byte{1})
		fr.WriteData(1, true, []byte("ghi"))
		for _, c := range b.Bytes() {
			tc.raw([]byte{c})
		}
		if len(tc.streams) != 1 {
			t.Fatal("no stream")
		}
		tc.streams[0].wantRead("abcdefghi", io.EOF)
	})
}
